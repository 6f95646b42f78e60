// Command shop is the sample application of forkd: every service of it, the clients that ask them, and the two
// ends of the benchmark, in one static binary.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"

	"forkd.dev/forkd/tests/shop/internal/bench"
	"forkd.dev/forkd/tests/shop/internal/client"
	"forkd.dev/forkd/tests/shop/internal/serve"
)

// version is set by the build.
var version = "dev"

const usage = `usage: shop serve SERVICE [flags]          run web, cart, price, stock, ledger, queue or clock
       shop client KIND --addr A [flags]   ask one of them, in one of many protocols
       shop bench-server [flags]           the far end of the benchmark
       shop bench-client --addr A MODE     the near end
       shop version
Each has --help.
`

func main() {
	err := run(os.Args[1:])
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return
	}
	fmt.Fprintln(os.Stderr, "shop:", err)
	os.Exit(1)
}

func run(args []string) error {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return errors.New("what to run?")
	}
	command, args := args[0], args[1:]
	switch command {
	case "serve":
		return serve.Main(args, version)
	case "client":
		return client.Main(args, os.Stdout)
	case "bench-server":
		return bench.ServerMain(args)
	case "bench-client":
		return bench.ClientMain(args, os.Stdout)
	case "version":
		fmt.Println(version)
		return nil
	}
	fmt.Fprint(os.Stderr, usage)
	return fmt.Errorf("there is no command %q", command)
}
