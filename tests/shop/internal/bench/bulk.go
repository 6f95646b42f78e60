package bench

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync/atomic"
	"time"
)

// dial opens a connection that ends with ctx.
func dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	return conn, nil
}

// flows are connections that carry bulk data.
type flows struct {
	conns []net.Conn
	count atomic.Uint64 // bytes that have arrived over all of them
	ended atomic.Int64  // flows that run no more
}

func (f *flows) close() {
	for _, conn := range f.conns {
		conn.Close()
	}
}

// open starts n flows, each of which runs until it is closed.
func open(ctx context.Context, addr string, n int, flow func(*flows, net.Conn)) (*flows, error) {
	f := new(flows)
	for range n {
		conn, err := dial(ctx, "tcp", addr)
		if err != nil {
			f.close()
			return nil, err
		}
		f.conns = append(f.conns, conn)
		go func() {
			flow(f, conn)
			f.ended.Add(1)
		}()
	}
	return f, nil
}

// rate is measured between the call and the call of what it returns.
func (f *flows) rate() func() *float64 {
	start, before := time.Now(), f.count.Load()
	return func() *float64 {
		gbit := float64(f.count.Load()-before) * 8 / 1e9 / time.Since(start).Seconds()
		return &gbit
	}
}

func up(ctx context.Context, o *options, r *Result) error   { return bulk(ctx, o, r, upFlow) }
func down(ctx context.Context, o *options, r *Result) error { return bulk(ctx, o, r, downFlow) }

func bulk(ctx context.Context, o *options, r *Result, flow func(*flows, net.Conn)) error {
	f, err := open(ctx, o.addr, o.flows, flow)
	if err != nil {
		return err
	}
	defer f.close()
	time.Sleep(o.warm)
	rate := f.rate()
	time.Sleep(o.duration)
	r.GbitPerS = rate()
	r.Flows, r.Seconds, r.Errors = o.flows, o.duration.Seconds(), int(f.ended.Load())
	return nil
}

func downFlow(f *flows, conn net.Conn) {
	block := make([]byte, blockBytes)
	for {
		n, err := conn.Read(block)
		f.count.Add(uint64(n))
		if err != nil {
			return
		}
	}
}

// upFlow counts what the sink says has come.
func upFlow(f *flows, conn net.Conn) {
	go func() {
		block := make([]byte, blockBytes)
		for {
			if _, err := conn.Write(block); err != nil {
				return
			}
		}
	}()
	var ack [8]byte
	var before uint64
	for {
		if _, err := io.ReadFull(conn, ack[:]); err != nil {
			return
		}
		total := binary.BigEndian.Uint64(ack[:])
		f.count.Add(total - before)
		before = total
	}
}
