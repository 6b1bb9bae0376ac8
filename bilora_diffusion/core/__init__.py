"""Base layer of the package: errors, files, options, values, seeds. It imports no other folder."""
