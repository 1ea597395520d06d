"""Data: from rows to the micro-batches of a training step.

`prepare.prepare(config.data, tokenizer, seed)` is the entry point. Its flow, one module per stage:

    sources     files (delimited: .csv, .tsv) and hub data sets (hub) -> rows: values by column, with their location
    template    a row -> prompt and completion, or text; chat: turns -> text and the spans of assistant turns
    texts       all rows -> a cached table of texts (cache)
    tokens      texts -> input_ids and labels: boundaries, special tokens, truncation
    encode      all texts -> a cached table of examples with its report (examples), after held-out parts and samples
    batches     examples -> StepPlan: optimizer steps, sharded by rank and packed into flat rows
"""
