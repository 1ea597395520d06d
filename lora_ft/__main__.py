"""`python -m lora_ft` runs the `lora-ft` command."""

from lora_ft.cli import main

if __name__ == "__main__":
    main()
