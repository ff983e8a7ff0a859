"""A request in, a result out: what each command does, without its printing. `import`, `report` and
`calibrate` are one call of a lower room each, made by `cli.commands`."""
