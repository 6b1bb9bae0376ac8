"""Options: how they are declared, read from a command line, checked and refused."""
