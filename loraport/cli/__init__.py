"""The command line, the only place that knows both the core and the converters."""
