"""`python -m raycap`."""

from raycap.cli import main

if __name__ == "__main__":
    main()
