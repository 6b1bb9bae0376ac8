"""Shared by every folder: errors, files, options, values and seeds. Imports no other folder."""
