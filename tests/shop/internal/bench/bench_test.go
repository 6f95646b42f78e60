package bench

import (
	"testing"
	"time"
)

func TestEveryModeMeasuresSomething(t *testing.T) {
	const any = "127.0.0.1:0"
	addrs, err := Serve(t.Context(), Addrs{any, any, any, any, any})
	if err != nil {
		t.Fatal(err)
	}
	short := options{duration: 50 * time.Millisecond, warm: 10 * time.Millisecond, rounds: 20, bytes: 64}
	for mode, addr := range map[string]string{
		"up": addrs.Sink, "down": addrs.Source, "echo": addrs.Echo, "connect": addrs.Echo,
		"connect-byte": addrs.Echo, "http": addrs.HTTP, "udp": addrs.UDP,
	} {
		o := short
		o.addr = addr
		r, err := Run(mode, o)
		switch {
		case err != nil:
			t.Errorf("%s: %v", mode, err)
		case mode == "up" || mode == "down":
			if *r.GbitPerS <= 0 {
				t.Errorf("%s: no bytes", mode)
			}
		case r.Count == 0 || *r.P50us <= 0 || *r.P99us < *r.P50us || r.Errors+r.Lost > 0:
			t.Errorf("%s: %+v", mode, r)
		}
	}

	o := short
	o.addr, o.beside, o.rounds = addrs.Echo, addrs.Source, maxRounds
	if r, err := Run("echo", o); err != nil || *r.BesideGbitPerS <= 0 {
		t.Errorf("echo beside a download: %+v, %v", r, err)
	}
}

func TestADeadServerIsAnError(t *testing.T) {
	for mode := range modes {
		if _, err := Run(mode, options{addr: "127.0.0.1:1", duration: 50 * time.Millisecond, rounds: 2, bytes: 64}); err == nil {
			t.Errorf("%s measured a server that is not there", mode)
		}
	}
}
