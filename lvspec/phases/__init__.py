"""One iteration: propose, verify, accept, commit, and what each of them works on."""
