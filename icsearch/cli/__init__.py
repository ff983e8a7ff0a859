"""The command line: parser, help, config file, and what is printed. The options themselves are fields of requests."""
