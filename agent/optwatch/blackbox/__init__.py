"""The black box: the last steps of every layer on disk, and who reads them after a death."""
