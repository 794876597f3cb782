"""The composition root: configuration -> live objects -> runs. The only reader of `evomerge.config` besides the CLI."""
