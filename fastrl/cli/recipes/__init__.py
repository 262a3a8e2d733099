"""Runs of `fastrl train RECIPE.toml`; `fastrl.cli.recipes.schema` says what a recipe is."""
