"""The flows and the console. Only `@flow` functions and the command line live here."""
