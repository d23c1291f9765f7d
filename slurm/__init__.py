"""From a recipe to a chain of Slurm jobs, one per stage.

`config.py` is the recipe's `slurm:` section, `render.py` makes the batch scripts (their fixed part is
`templates/stage.sh`), `submit.py` is `hsa submit`, and `jobs.py` is what a run directory remembers about its jobs.
This room knows recipes and run directories, never the model.
"""
