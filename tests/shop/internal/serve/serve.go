// Package serve runs one service of the shop, in a pod or on a laptop.
package serve

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"forkd.dev/forkd/tests/shop/internal/args"
	"forkd.dev/forkd/tests/shop/internal/who"
)

// role is what tells one service of the shop from another.
type role struct {
	listen   []string          // in the order of the --listen flags
	children map[string]string // the services it calls, by name
	passOn   []string          // the carriers its calls take along
	start    func(*Service, []string) error
}

// stock is the service that forgets: like an old tracing library it knows traceparent and nothing else,
// so its calls to ledger do not belong to the fork any more.
var roles = map[string]role{
	"web":    {[]string{":8080"}, map[string]string{"cart": "http://cart:8080"}, who.CarrierNames, startHTTP},
	"cart":   {[]string{":8080"}, map[string]string{"price": "grpc://price:50051", "stock": "http://stock:8080"}, who.CarrierNames, startHTTP},
	"stock":  {[]string{":8080"}, map[string]string{"ledger": "http://ledger:8080"}, []string{"traceparent"}, startHTTP},
	"ledger": {[]string{":8080"}, nil, who.CarrierNames, startHTTP},
	"price":  {[]string{":50051"}, nil, who.CarrierNames, startPrice},
	"queue":  {[]string{":7000", ":7001"}, nil, nil, startQueue},
	"clock":  {[]string{":7002"}, nil, nil, startClock},
}

// Roles are the names of the services.
func Roles() []string { return slices.Sorted(maps.Keys(roles)) }

// Config says which service to run. Empty fields take the role's defaults.
type Config struct {
	Role     string
	Listen   []string
	Children map[string]string
	PassOn   []string
	Self     who.Self
	Log      *slog.Logger
}

// Service is a running service.
type Service struct {
	Addrs []string // where it listens, in the order of Config.Listen

	self     who.Self
	log      *slog.Logger
	passOn   []string
	children []child
	stops    []func(context.Context)
	failed   chan error
}

// Start binds the service's ports and serves them until Stop.
func Start(c Config) (*Service, error) {
	r, ok := roles[c.Role]
	if !ok {
		return nil, fmt.Errorf("no service is called %q: it is one of %s", c.Role, strings.Join(Roles(), ", "))
	}
	listen := slices.Clone(r.listen)
	if copy(listen, c.Listen) < len(c.Listen) {
		return nil, fmt.Errorf("%s listens on %d port(s), not %d", c.Role, len(r.listen), len(c.Listen))
	}
	s := &Service{self: c.Self, log: c.Log, passOn: r.passOn, failed: make(chan error, 4)}
	s.self.Service = cmp.Or(s.self.Service, c.Role)
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if c.PassOn != nil {
		s.passOn = c.PassOn
	}
	for name := range c.Children {
		if _, ok := r.children[name]; !ok {
			return nil, fmt.Errorf("%s does not call %q", c.Role, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.children)) {
		child, err := newChild(name, cmp.Or(c.Children[name], r.children[name]))
		if err != nil {
			return nil, err
		}
		s.children = append(s.children, child)
		s.onStop(func(context.Context) { child.close() })
	}
	if err := r.start(s, listen); err != nil {
		s.Stop(context.Background())
		return nil, err
	}
	s.log.Info("serving", "service", s.self.Service, "version", s.self.Version, "where", s.self.Where, "listen", s.Addrs)
	return s, nil
}

// Stop ends the service: what is being answered may finish until ctx ends.
func (s *Service) Stop(ctx context.Context) {
	for _, stop := range slices.Backward(s.stops) {
		stop(ctx)
	}
}

func (s *Service) onStop(stop func(context.Context)) { s.stops = append(s.stops, stop) }

// listen binds a TCP port and notes its address.
func (s *Service) listen(addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	s.Addrs = append(s.Addrs, l.Addr().String())
	return l, nil
}

// fail reports the end of a listener, unless it was closed on purpose.
func (s *Service) fail(err error) {
	if err != nil && !errors.Is(err, net.ErrClosed) {
		s.failed <- err
	}
}

// Main runs `shop serve`.
func Main(arguments []string, version string) error {
	var listen, children args.List
	flags := flag.NewFlagSet("shop serve", flag.ContinueOnError)
	flags.Var(&listen, "listen", "`address` to listen on; a service with two ports takes it twice")
	flags.Var(&children, "child", "`name=address` of a called service, as in stock=http://localhost:8081 (or SHOP_ADDR_STOCK)")
	where := flags.String("where", cmp.Or(os.Getenv("SHOP_WHERE"), "cluster"), "where the service says it runs")
	version = cmp.Or(os.Getenv("SHOP_VERSION"), version)
	flags.StringVar(&version, "version", version, "the version it says it is")
	passOn := flags.String("pass-on", os.Getenv("SHOP_PASS_ON"), "carrier headers that calls take along, by comma; \"none\" for none")
	quiet := flags.Bool("quiet", false, "log no requests")
	plain, err := args.Parse(flags, arguments)
	if err != nil {
		return err
	}
	if len(plain) != 1 {
		return fmt.Errorf("which service? One of %s", strings.Join(Roles(), ", "))
	}

	pod, _ := os.Hostname()
	config := Config{
		Role: plain[0], Listen: listen, Children: map[string]string{},
		Self: who.Self{Version: version, Pod: pod, Where: *where},
		Log:  slog.New(slog.NewTextHandler(logTo(*quiet), nil)),
	}
	if *passOn != "" {
		config.PassOn = strings.Split(*passOn, ",")
	}
	for name := range roles[config.Role].children {
		if addr := os.Getenv("SHOP_ADDR_" + strings.ToUpper(name)); addr != "" {
			config.Children[name] = addr
		}
	}
	for _, pair := range children {
		name, addr, _ := strings.Cut(pair, "=")
		config.Children[name] = addr
	}

	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	service, err := Start(config)
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		service.Stop(ctx)
		return nil
	case err := <-service.failed:
		return err
	}
}

func logTo(quiet bool) io.Writer {
	if quiet {
		return io.Discard
	}
	return os.Stdout
}
