module forkd.dev/forkd/tests/cluster/tools

go 1.25.0
