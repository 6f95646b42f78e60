// Package client asks the services of the shop and prints, as JSON lines, who answered.
package client

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/status"

	"forkd.dev/forkd/tests/shop/internal/args"
	"forkd.dev/forkd/tests/shop/internal/who"
)

// maxN bounds every loop.
const maxN = 100_000

// Line is what is printed for one request, call or connection.
type Line struct {
	Ask       int               `json:"ask"`
	Key       string            `json:"key"`              // the key that was sent
	Answer    *who.Answer       `json:"answer,omitempty"` // who answered
	Conn      string            `json:"conn,omitempty"`   // the connection's own address: the same for what shared one
	Proto     string            `json:"proto,omitempty"`
	Status    int               `json:"status,omitempty"`    // of HTTP
	Code      string            `json:"code,omitempty"`      // of gRPC
	ServedBy  string            `json:"served_by,omitempty"` // the header forkd-served-by
	Messages  int               `json:"messages,omitempty"`  // that came back, after the one that says who answered
	Bytes     int64             `json:"bytes,omitempty"`     // that came back
	Same      *bool             `json:"same,omitempty"`      // what came back is what was sent
	Continued bool              `json:"continued,omitempty"` // "100 Continue" came
	Trailers  map[string]string `json:"trailers,omitempty"`
	Body      json.RawMessage   `json:"body,omitempty"`     // where it does not say who answered: JSON as it is, text as a string
	FirstMs   float64           `json:"first_ms,omitempty"` // until the first byte or message of the answer
	Ms        float64           `json:"ms"`
	Error     string            `json:"error,omitempty"`
	Errno     string            `json:"errno,omitempty"`
}

type options struct {
	addr, path, method, carrier string
	keys                        []string
	n, bytes, parallel, ms      int
	keepalive, expect           bool
	headers, trailers           args.List
	timeout                     time.Duration
}

// asker is one client: what it is asked may share a connection.
type asker struct {
	ask   func(ctx context.Context, key string, line *Line) error
	close func()
}

type kind struct {
	help     string
	requests bool // --n counts requests; otherwise the messages of each call or connection
	open     func(*options) (asker, error)
}

var kinds = map[string]kind{
	"http1":         {"HTTP/1.1 requests", true, openHTTP(false)},
	"h2c":           {"HTTP/2 cleartext requests", true, openHTTP(true)},
	"grpc":          {"gRPC unary calls", true, openGRPC(askGet)},
	"grpc-stream":   {"a gRPC call answered by a stream", false, openGRPC(askWatch)},
	"grpc-chat":     {"a gRPC call with streams both ways, and trailers", false, openGRPC(askChat)},
	"grpc-health":   {"the standard health service", true, openGRPC(askHealth)},
	"ws":            {"a WebSocket that is echoed to", false, openStateless(askWebSocket)},
	"tcp":           {"TCP where the client speaks first", false, openStateless(askTCP)},
	"tcp-greets":    {"TCP where the server speaks first", false, openStateless(askGreeting)},
	"tcp-halfclose": {"send, end this side, count what comes back", false, openStateless(askHalfClose)},
	"tcp-reset":     {"ask for a reset", false, openStateless(askReset)},
	"udp":           {"UDP packets", false, openStateless(askUDP)},
	"connect":       {"connect() and its errno", true, openStateless(askConnect)},
}

// Main runs `shop client`.
func Main(arguments []string, out io.Writer) error {
	var o options
	var key, mixed string
	flags := flag.NewFlagSet("shop client", flag.ContinueOnError)
	flags.StringVar(&o.addr, "addr", "", "`host:port` to ask")
	flags.StringVar(&key, "key", "", "fork key to send")
	flags.StringVar(&mixed, "mixed", "", "fork keys to send in turn, by comma; \"-\" for none")
	flags.StringVar(&o.carrier, "carrier", "baggage", "header that carries the key: baggage, tracestate or x-forkd-id")
	flags.IntVar(&o.n, "n", 0, "how many requests, or messages on each connection")
	flags.BoolVar(&o.keepalive, "keepalive", false, "one connection for all requests")
	flags.IntVar(&o.parallel, "parallel", 1, "requests at the same time")
	flags.DurationVar(&o.timeout, "timeout", 10*time.Second, "for each request or connection")
	flags.IntVar(&o.bytes, "bytes", 0, "size of the request body, message or packet")
	flags.IntVar(&o.ms, "ms", 0, "between the messages of a stream")
	flags.StringVar(&o.path, "path", "/", "HTTP path")
	flags.StringVar(&o.method, "method", "", "HTTP method (GET, or POST with a body)")
	flags.Var(&o.headers, "header", "`name: value` of an HTTP header")
	flags.Var(&o.trailers, "trailer", "`name: value` of an HTTP trailer")
	flags.BoolVar(&o.expect, "expect-continue", false, "hold the body back until \"100 Continue\"")
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: shop client KIND --addr host:port [flags]")
		for _, name := range slices.Sorted(maps.Keys(kinds)) {
			fmt.Fprintf(flags.Output(), "  %-14s %s\n", name, kinds[name].help)
		}
		flags.PrintDefaults()
	}
	plain, err := args.Parse(flags, arguments)
	if err != nil {
		return err
	}
	if len(plain) != 1 || o.addr == "" {
		flags.Usage()
		return errors.New("a kind and --addr are needed")
	}
	kind, ok := kinds[plain[0]]
	if !ok {
		return fmt.Errorf("no kind is called %q", plain[0])
	}
	o.keys = []string{key}
	if mixed != "" {
		o.keys = strings.Split(mixed, ",")
	}
	asks := len(o.keys)
	if kind.requests && o.n > 0 {
		asks = o.n
	}
	o.n = min(max(o.n, 1), maxN)
	return run(&o, kind, min(asks, maxN), out)
}

// run asks and prints. It fails if any of the asks did.
func run(o *options, kind kind, asks int, out io.Writer) error {
	var shared *asker
	if o.keepalive {
		a, err := kind.open(o)
		if err != nil {
			return err
		}
		defer a.close()
		shared = &a
	}
	var (
		mu     sync.Mutex
		failed int
		group  sync.WaitGroup
		slots  = make(chan struct{}, max(o.parallel, 1))
		lines  = json.NewEncoder(out)
	)
	for i := range asks {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			line := one(o, kind, shared, i)
			mu.Lock()
			defer mu.Unlock()
			if line.Error != "" {
				failed++
			}
			lines.Encode(line)
		})
	}
	group.Wait()
	if failed > 0 {
		return fmt.Errorf("%d of %d failed", failed, asks)
	}
	return nil
}

func one(o *options, kind kind, shared *asker, i int) Line {
	key := o.keys[i%len(o.keys)]
	if key == "-" {
		key = ""
	}
	line := Line{Ask: i, Key: key}
	ctx, cancel := context.WithTimeout(context.Background(), o.timeout)
	defer cancel()
	start := time.Now()
	err := func() error {
		if shared != nil {
			return shared.ask(ctx, key, &line)
		}
		a, err := kind.open(o)
		if err != nil {
			return err
		}
		defer a.close()
		return a.ask(ctx, key, &line)
	}()
	line.Ms = since(start)
	if err != nil {
		line.Error = err.Error()
		line.Errno = errnoName(err)
	}
	return line
}

func openStateless(ask func(context.Context, *options, string, *Line) error) func(*options) (asker, error) {
	return func(o *options) (asker, error) {
		return asker{
			ask:   func(ctx context.Context, key string, line *Line) error { return ask(ctx, o, key, line) },
			close: func() {},
		}, nil
	}
}

// errnoName is what a C program would have seen, or the code of a gRPC error.
func errnoName(err error) string {
	var errno syscall.Errno
	var dns *net.DNSError
	switch s, isStatus := status.FromError(err); {
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	case errors.As(err, &dns):
		return "ENOTFOUND"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return "ETIMEDOUT"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "EOF"
	case isStatus:
		return s.Code().String()
	}
	return ""
}

// payload is n bytes that tell an echo from anything else: the same for every n.
func payload(n int) []byte {
	b := make([]byte, n)
	for i, x := 0, uint32(2463534242); i < n; i++ {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[i] = byte(x)
	}
	return b
}

func since(start time.Time) float64 {
	return float64(time.Since(start).Microseconds()) / 1000
}
