"""`python -m hf_polyattn` is `polyattn`."""

from .cli import main

if __name__ == "__main__":
    main()
