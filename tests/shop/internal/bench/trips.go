package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

// udpWait is when a packet counts as lost.
const udpWait = time.Second

// meanwhile runs measure, beside a download if one is asked for.
func meanwhile(ctx context.Context, o *options, r *Result, measure func() error) error {
	if o.beside == "" {
		return measure()
	}
	f, err := open(ctx, o.beside, 1, downFlow)
	if err != nil {
		return err
	}
	defer f.close()
	time.Sleep(o.warm)
	rate := f.rate()
	err = measure()
	r.BesideGbitPerS, r.Errors = rate(), int(f.ended.Load())
	return err
}

// rounds calls trip up to o.rounds times and for o.duration at most. after is not measured.
func rounds(o *options, trip func() error, after func()) ([]time.Duration, error) {
	took := make([]time.Duration, 0, o.rounds)
	begin := time.Now()
	for len(took) < o.rounds && time.Since(begin) < o.duration {
		start := time.Now()
		if err := trip(); err != nil {
			return took, err
		}
		took = append(took, time.Since(start))
		after()
	}
	return took, nil
}

func echoTrips(ctx context.Context, o *options, r *Result) error {
	conn, err := dial(ctx, "tcp", o.addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	r.Bytes = o.bytes
	message, reply := make([]byte, o.bytes), make([]byte, o.bytes)
	return meanwhile(ctx, o, r, func() error {
		took, err := rounds(o, func() error {
			if _, err := conn.Write(message); err != nil {
				return err
			}
			_, err := io.ReadFull(conn, reply)
			return err
		}, func() {})
		r.times(took)
		return err
	})
}

func connects(withByte bool) func(context.Context, *options, *Result) error {
	return func(ctx context.Context, o *options, r *Result) error {
		var conn net.Conn
		one := []byte{1}
		took, err := rounds(o, func() (err error) {
			if conn, err = dial(ctx, "tcp", o.addr); err != nil || !withByte {
				return err
			}
			if _, err = conn.Write(one); err != nil {
				return err
			}
			_, err = io.ReadFull(conn, one)
			return err
		}, func() { conn.Close() })
		r.times(took)
		return err
	}
}

func udpTrips(ctx context.Context, o *options, r *Result) error {
	conn, err := dial(ctx, "udp", o.addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	r.Bytes = o.bytes
	message, reply := make([]byte, max(o.bytes, 4)), make([]byte, 64<<10)
	var number uint32
	return meanwhile(ctx, o, r, func() error {
		took := make([]time.Duration, 0, o.rounds)
		begin := time.Now()
		for len(took)+r.Lost < o.rounds && time.Since(begin) < o.duration {
			number++
			start := time.Now()
			switch err := packetTrip(conn, number, message, reply); {
			case errors.Is(err, os.ErrDeadlineExceeded):
				r.Lost++
			case err != nil:
				return err
			default:
				took = append(took, time.Since(start))
			}
		}
		r.times(took)
		return nil
	})
}

// packetTrip sends a numbered packet and waits for it, past late ones.
func packetTrip(conn net.Conn, number uint32, message, reply []byte) error {
	binary.BigEndian.PutUint32(message, number)
	conn.SetReadDeadline(time.Now().Add(udpWait))
	if _, err := conn.Write(message); err != nil {
		return err
	}
	for {
		n, err := conn.Read(reply)
		if err != nil {
			return err
		}
		if n == len(message) && string(reply[:4]) == string(message[:4]) {
			return nil
		}
	}
}

func httpRequests(ctx context.Context, o *options, r *Result) error {
	transport := &http.Transport{MaxIdleConnsPerHost: o.flows, MaxConnsPerHost: o.flows, DisableCompression: true}
	defer transport.CloseIdleConnections()
	var (
		mu     sync.Mutex
		all    []time.Duration
		failed error
		group  sync.WaitGroup
	)
	begin := time.Now()
	measured, end := begin.Add(o.warm), begin.Add(o.warm+o.duration)
	for range o.flows {
		group.Go(func() {
			var took []time.Duration
			var errs int
			var last error
			for time.Now().Before(end) && ctx.Err() == nil && errs < maxErrors {
				start := time.Now()
				err := get(ctx, transport, o.addr)
				if err != nil {
					errs++
					last = err
				} else if start.After(measured) {
					took = append(took, time.Since(start))
				}
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
			r.Errors += errs
			if last != nil {
				failed = last
			}
		})
	}
	group.Wait()
	perSecond := float64(len(all)) / time.Since(measured).Seconds()
	r.PerSecond = &perSecond
	r.Flows, r.Seconds = o.flows, o.duration.Seconds()
	r.times(all)
	if len(all) == 0 {
		return failed
	}
	return nil
}

// maxErrors is when a connection of the HTTP mode gives up.
const maxErrors = 100

func get(ctx context.Context, transport *http.Transport, addr string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/", nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}
