// Package bench measures a path: a server with one port for each kind of traffic, and the client that loads it.
package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os/signal"
	"syscall"
	"time"
)

// longest bounds every connection to the server, so that a client that was lost does not load it for ever.
const longest = 2 * time.Minute

// ackEvery is how often the sink says how many bytes have come, since what a sender wrote may still be on its way.
const ackEvery = 10 * time.Millisecond

// blockBytes is large enough to make the cost of a system call small beside that of the copy.
const blockBytes = 256 << 10

// Addrs are the addresses of a server.
type Addrs struct {
	Sink   string // TCP: takes bytes, and says how many as 8 bytes, big endian, now and then
	Source string // TCP: sends bytes
	Echo   string // TCP
	HTTP   string // a small answer
	UDP    string // echo
}

// Serve listens on addrs until ctx ends, and gives the addresses that were bound.
func Serve(ctx context.Context, addrs Addrs) (Addrs, error) {
	for _, port := range []struct {
		addr  *string
		serve func(net.Conn)
	}{{&addrs.Sink, sink}, {&addrs.Source, source}, {&addrs.Echo, echo}} {
		l, err := net.Listen("tcp", *port.addr)
		if err != nil {
			return addrs, err
		}
		*port.addr = l.Addr().String()
		context.AfterFunc(ctx, func() { l.Close() })
		go accept(l, port.serve)
	}

	web, err := net.Listen("tcp", addrs.HTTP)
	if err != nil {
		return addrs, err
	}
	addrs.HTTP = web.Addr().String()
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(tiny)}
	context.AfterFunc(ctx, func() { server.Close() })
	go server.Serve(web)

	packets, err := net.ListenPacket("udp", addrs.UDP)
	if err != nil {
		return addrs, err
	}
	addrs.UDP = packets.LocalAddr().String()
	context.AfterFunc(ctx, func() { packets.Close() })
	go echoPackets(packets)
	return addrs, nil
}

func accept(l net.Listener, serve func(net.Conn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		conn.SetDeadline(time.Now().Add(longest))
		go func() {
			defer conn.Close()
			serve(conn)
		}()
	}
}

func sink(conn net.Conn) {
	block := make([]byte, blockBytes)
	var total uint64
	var acked time.Time
	for {
		n, err := conn.Read(block)
		total += uint64(n)
		if now := time.Now(); err != nil || now.Sub(acked) > ackEvery {
			if _, err := conn.Write(binary.BigEndian.AppendUint64(nil, total)); err != nil {
				return
			}
			acked = now
		}
		if err != nil {
			return
		}
	}
}

func source(conn net.Conn) {
	block := make([]byte, blockBytes)
	for {
		if _, err := conn.Write(block); err != nil {
			return
		}
	}
}

func echo(conn net.Conn) { io.Copy(conn, conn) }

func tiny(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain")
	io.WriteString(w, "ok\n")
}

func echoPackets(conn net.PacketConn) {
	packet := make([]byte, 64<<10)
	for {
		n, from, err := conn.ReadFrom(packet)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			conn.WriteTo(packet[:n], from)
		}
	}
}

// ServerMain runs `shop bench-server`.
func ServerMain(arguments []string) error {
	var addrs Addrs
	flags := flag.NewFlagSet("shop bench-server", flag.ContinueOnError)
	flags.StringVar(&addrs.Sink, "sink", ":9001", "`address` that takes bytes")
	flags.StringVar(&addrs.Source, "source", ":9002", "`address` that sends bytes")
	flags.StringVar(&addrs.Echo, "echo", ":9003", "`address` that echoes bytes")
	flags.StringVar(&addrs.HTTP, "http", ":9004", "`address` of small HTTP answers")
	flags.StringVar(&addrs.UDP, "udp", ":9005", "`address` that echoes UDP packets")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	bound, err := Serve(ctx, addrs)
	if err != nil {
		return err
	}
	slog.Info("serving", "sink", bound.Sink, "source", bound.Source, "echo", bound.Echo, "http", bound.HTTP, "udp", bound.UDP)
	<-ctx.Done()
	return nil
}
