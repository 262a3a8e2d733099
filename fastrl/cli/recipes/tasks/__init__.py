"""Builders: real texts as rows of prompts and references; `fastrl.cli.recipes.data` calls them."""

BUILDERS = {
    "wikitext_continuation": "fastrl.cli.recipes.tasks.continuation:build",
    "wikitext_headings": "fastrl.cli.recipes.tasks.summarisation:build",
    "shakespeare_dialogue": "fastrl.cli.recipes.tasks.dialogue:build",
    "multi30k_translation": "fastrl.cli.recipes.tasks.translation:build",
    "multi30k_pairs": "fastrl.cli.recipes.tasks.pairs:build",
}
