"""The subcommands of `genkit`: what each is told, and the verb that it calls."""
