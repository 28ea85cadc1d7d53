"""`gpulane wait`."""

import click


@click.command()
def wait() -> None:
    """Wait."""
