"""`gpulane submit`."""

import click


@click.command()
def submit() -> None:
    """Submit jobs."""
