"""``python -m csulora_callback`` is the command ``csulora``."""

from csulora_callback.cli import main

if __name__ == "__main__":
    main()
