"""A stage behind OpenAI's HTTP interface: completions and chat completions."""
