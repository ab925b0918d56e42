"""`python -m genkit` is the command `genkit`."""

from genkit.cli import main

if __name__ == "__main__":
    main()
