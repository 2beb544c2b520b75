"""``python -m dualpipe_ext``: the same as the ``dualpipe`` command."""

from dualpipe_ext.cli.main import entry

if __name__ == "__main__":
    entry()
