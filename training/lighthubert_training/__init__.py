"""Everything that makes, measures and ships a LightHuBERT: a ground floor that exists once, and a folder for each job.

The ground floor (`runs`, `data`, `models` and what lies beside them) imports no job, and a job no other job."""
