"""From FASTA files to sequence classifiers."""
