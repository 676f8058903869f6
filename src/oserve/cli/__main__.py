"""``python -m oserve.cli``: the same as the ``oserve`` command."""

from oserve.cli import main

main()
