"""Model folders on disk: a lazy reader, a writer of fixed layout, the journal of a run."""
