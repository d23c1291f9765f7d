"""What a trained model can do: retrieval at any length, perplexity by position, and text.

A tour. `niah` places one fact at a chosen depth of held-out text and asks for it; `ruler` does the same with several
facts, chains of variables, and copying. Both go through `retrieval`, where the model answers by its own greedy
generation (`decoding`) and an answer counts only when it is exact. `ppl` scores held-out text position by position.
`plots` draws the results, `report` prints and stores them, `commands` is the command line (`hsa eval`) and `generate`
is `hsa generate`.

Everything sees the model through three methods: prefill, decode, score (`decoding.Engine`).
"""
