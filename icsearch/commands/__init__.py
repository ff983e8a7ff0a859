"""A request in, a result out: what each command does, without its options and its printing."""
