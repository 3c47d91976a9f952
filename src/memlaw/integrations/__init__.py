"""MemFT, audits and certificates for people who keep their own trainer.

In: a Transformers or TRL trainer, records. Out: a trainer that trains with MemFT's objectives, and
a folder with the adapter that it trained and a certificate. May import all but `writer`, `probe`,
`report` and `cli`. `memlaw.integrations.trl` needs the extra `trl`.
"""
