package bench

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"forkd.dev/forkd/tests/shop/internal/args"
)

// Bounds on the load, whatever the flags say.
const (
	maxDuration = time.Minute
	maxRounds   = 100_000
	maxFlows    = 256
)

type options struct {
	addr, beside   string
	flows          int
	duration, warm time.Duration
	rounds         int
	bytes          int
}

// Result is what a mode measured: it has the fields that the mode fills.
type Result struct {
	Mode    string  `json:"mode"`
	Addr    string  `json:"addr"`
	Flows   int     `json:"flows,omitempty"`
	Seconds float64 `json:"seconds,omitempty"`
	Bytes   int     `json:"bytes,omitempty"` // of one message

	GbitPerS       *float64 `json:"gbit_per_s,omitempty"`
	BesideGbitPerS *float64 `json:"beside_gbit_per_s,omitempty"`
	PerSecond      *float64 `json:"per_second,omitempty"`

	Count  int      `json:"count,omitempty"`
	Lost   int      `json:"lost,omitempty"`
	Errors int      `json:"errors,omitempty"` // requests that failed, flows that ended too early
	P50us  *float64 `json:"p50_us,omitempty"`
	P90us  *float64 `json:"p90_us,omitempty"`
	P99us  *float64 `json:"p99_us,omitempty"`
	MaxUs  *float64 `json:"max_us,omitempty"`
}

type mode struct {
	port, help string
	run        func(context.Context, *options, *Result) error
}

var modes = map[string]mode{
	"up":           {"sink", "bytes to the server, as the server counts them", up},
	"down":         {"source", "bytes from the server", down},
	"echo":         {"echo", "round trip of a message, beside a download if --beside is given", echoTrips},
	"connect":      {"echo", "connect()", connects(false)},
	"connect-byte": {"echo", "connect(), and one byte there and back", connects(true)},
	"http":         {"http", "HTTP/1.1 requests over kept-alive connections", httpRequests},
	"udp":          {"udp", "round trip of a packet", udpTrips},
}

// ClientMain runs `shop bench-client`.
func ClientMain(arguments []string, out io.Writer) error {
	var o options
	flags := flag.NewFlagSet("shop bench-client", flag.ContinueOnError)
	flags.StringVar(&o.addr, "addr", "", "`host:port` of the server, the port that fits the mode")
	flags.StringVar(&o.beside, "beside", "", "`host:port` of a source to download from meanwhile (echo, udp)")
	flags.IntVar(&o.flows, "flows", 0, "connections (1; 16 for http)")
	flags.DurationVar(&o.duration, "duration", 5*time.Second, "of up, down and http; the others stop after it, too")
	flags.DurationVar(&o.warm, "warm", 500*time.Millisecond, "to run before measuring (up, down, http, beside)")
	flags.IntVar(&o.rounds, "rounds", 1000, "of echo, connect, connect-byte and udp")
	flags.IntVar(&o.bytes, "bytes", 64, "of one message of echo and udp")
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: shop bench-client --addr host:port MODE [flags]")
		for _, name := range slices.Sorted(maps.Keys(modes)) {
			fmt.Fprintf(flags.Output(), "  %-13s %s (port: %s)\n", name, modes[name].help, modes[name].port)
		}
		flags.PrintDefaults()
	}
	plain, err := args.Parse(flags, arguments)
	if err != nil {
		return err
	}
	if len(plain) != 1 || o.addr == "" {
		flags.Usage()
		return errors.New("a mode and --addr are needed")
	}
	result, err := Run(plain[0], o)
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(result)
}

// Run measures one mode.
func Run(name string, o options) (*Result, error) {
	mode, ok := modes[name]
	if !ok {
		return nil, fmt.Errorf("no mode is called %q: it is one of %s", name, strings.Join(slices.Sorted(maps.Keys(modes)), ", "))
	}
	if o.flows <= 0 {
		o.flows = 1
		if name == "http" {
			o.flows = 16
		}
	}
	o.flows = min(o.flows, maxFlows)
	o.duration = min(o.duration, maxDuration)
	o.warm = min(o.warm, maxDuration)
	o.rounds = min(o.rounds, maxRounds)
	o.bytes = max(o.bytes, 1)
	// A path that stalls must not stall the benchmark: the spare time is for connecting.
	ctx, cancel := context.WithTimeout(context.Background(), o.warm+o.duration+10*time.Second)
	defer cancel()
	result := &Result{Mode: name, Addr: o.addr}
	return result, mode.run(ctx, &o, result)
}

// times fills in the percentiles.
func (r *Result) times(took []time.Duration) {
	r.Count = len(took)
	if len(took) == 0 {
		return
	}
	slices.Sort(took)
	at := func(percent int) *float64 {
		us := float64(took[(len(took)-1)*percent/100].Nanoseconds()) / 1000
		return &us
	}
	r.P50us, r.P90us, r.P99us, r.MaxUs = at(50), at(90), at(99), at(100)
}
