"""The commands of the pipeline, one module each: flags and a body of a few lines. `scripts/` calls them, too."""
