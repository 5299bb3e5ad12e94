"""The bundle: the directory that is shipped."""
