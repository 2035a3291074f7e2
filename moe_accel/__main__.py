"""`python -m moe_accel` is `moe-accel`."""

from moe_accel.cli import main

if __name__ == "__main__":
    main()
