-- Run by PostgreSQL's image once, when its volume is empty.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
