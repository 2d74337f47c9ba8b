"""One point of a sweep, or a part that points share, in a process of its own; `sweep` starts it."""

from ppo_jax import cli
from ppo_jax.pipeline import children


def main():
    """Take the work from the standard input, and do it."""
    work = children.receive()
    cli.begin_process()
    cli.call(lambda: children.serve(work))


if __name__ == "__main__":
    main()
