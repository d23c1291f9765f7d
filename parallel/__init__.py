"""How the model is laid out over ranks: Megatron-core and its repairs, the mesh, optimizers, distributed checkpoint.

    errors.py      what the user can mend: TopologyError, CheckpointError
    optional.py    apex, Transformer Engine, DeepSpeed: found without importing them
    compat.py      Megatron-core's names, version differences and the CPU shim; nobody else imports Megatron
    repairs.py     what is mended in Megatron on every machine
    mesh.py        parallel sizes, their check, process groups and seeds
    optimizer.py   AdamW through Megatron's (distributed) optimizer, and Muon, behind one interface
    muon.py        Muon: momentum made orthogonal, for matrices
    checkpoint.py  the distributed checkpoint: whole or absent, verified, rotated (checkpoint_files.py: its files)

This room knows tensors, modules and ranks, nothing of recipes or training loops.
"""
