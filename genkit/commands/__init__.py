"""The subcommands of `genkit`: the flags of each, and the verb that it calls."""
