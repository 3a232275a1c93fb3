"""Commands of klbench/cli.py that have a file of their own: words to a call, what comes out to the terminal."""
