"""Entry point of the command, kept apart so that a missing extra is said in one sentence."""

import sys


def main() -> int:
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"coppice: the command line needs {error.name}: pip install 'coppice[cli]'", file=sys.stderr)
        return 2
    from coppice.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
