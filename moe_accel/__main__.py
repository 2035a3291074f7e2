"""`python -m moe_accel` is `moe-accel`: the entry point, that is quiet about Ctrl-C from its first line on."""


def main() -> None:
    """Run the command line; exit 130 where it is interrupted while it is imported."""
    try:
        from moe_accel.cli import main as run

        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
