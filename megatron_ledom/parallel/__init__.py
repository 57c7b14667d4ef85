"""Process groups of a run, the rendezvous of its ranks, and operations that they call together."""
