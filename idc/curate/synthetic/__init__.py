"""References that are made and not found: a subject shown alone in another pose, view and light, or taken out of a
scene that never was.

`editors` is the interface; `diffusion` runs an editing pipeline here, `hosted` asks a model over HTTP, `augmentation`
is the paper's baseline. `prompts` says what is asked, `checks` what is kept, and `step` puts them into the pipeline.
"""
