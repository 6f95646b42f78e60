package client

import (
	"context"
	"io"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"forkd.dev/forkd/tests/shop/internal/price"
	"forkd.dev/forkd/tests/shop/internal/who"
)

type callFunc func(context.Context, *options, grpc.ClientConnInterface, *Line, ...grpc.CallOption) error

func openGRPC(call callFunc) func(*options) (asker, error) {
	return func(o *options) (asker, error) {
		conn, err := grpc.NewClient("passthrough:///"+o.addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
		if err != nil {
			return asker{}, err
		}
		ask := func(ctx context.Context, key string, line *Line) error {
			var from peer.Peer
			var header, trailer metadata.MD
			ctx = metadata.NewOutgoingContext(ctx, metadata.MD(who.Carry(o.carrier, key)))
			err := call(ctx, o, conn, line, grpc.Peer(&from), grpc.Header(&header), grpc.Trailer(&trailer))
			if from.LocalAddr != nil {
				line.Conn = from.LocalAddr.String()
			}
			line.Proto = "gRPC"
			line.Code = status.Code(err).String()
			line.ServedBy = strings.Join(header.Get("forkd-served-by"), ",")
			line.Trailers = flat(trailer)
			return err
		}
		return asker{ask: ask, close: func() { conn.Close() }}, nil
	}
}

func askGet(ctx context.Context, _ *options, conn grpc.ClientConnInterface, line *Line, opts ...grpc.CallOption) error {
	m, err := price.Client{ClientConnInterface: conn}.Get(ctx, new(price.Message), opts...)
	if err != nil {
		return err
	}
	line.Answer = new(who.Answer)
	return price.Unpack(m, line.Answer)
}

func askHealth(ctx context.Context, _ *options, conn grpc.ClientConnInterface, line *Line, opts ...grpc.CallOption) error {
	r, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, new(grpc_health_v1.HealthCheckRequest), opts...)
	if err != nil {
		return err
	}
	line.Body = show([]byte(r.Status.String()))
	return nil
}

func askWatch(ctx context.Context, o *options, conn grpc.ClientConnInterface, line *Line, opts ...grpc.CallOption) error {
	start := time.Now()
	ask, err := price.Pack(map[string]int{"n": o.n, "ms": o.ms})
	if err != nil {
		return err
	}
	stream, err := price.Client{ClientConnInterface: conn}.Watch(ctx, ask, opts...)
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := line.add(m, start); err != nil {
			return err
		}
	}
}

func askChat(ctx context.Context, o *options, conn grpc.ClientConnInterface, line *Line, opts ...grpc.CallOption) error {
	start := time.Now()
	stream, err := price.Client{ClientConnInterface: conn}.Chat(ctx, opts...)
	if err != nil {
		return err
	}
	same := true
	line.Same = &same
	text := strings.Repeat("x", o.bytes)
	for i := range o.n {
		out, err := price.Pack(map[string]any{"i": i, "text": text})
		if err != nil {
			return err
		}
		if err := stream.Send(out); err != nil && err != io.EOF {
			return err
		}
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := line.add(m, start); err != nil {
			return err
		}
		echo := m.Fields["echo"].GetStructValue().GetFields()
		same = same && echo["i"].GetNumberValue() == float64(i) && echo["text"].GetStringValue() == text
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if _, err = stream.Recv(); err == io.EOF {
		return nil
	}
	return err
}

// add counts one message of a stream. The first says who answered.
func (line *Line) add(m *price.Message, start time.Time) error {
	line.Messages++
	if line.Messages > 1 {
		return nil
	}
	line.FirstMs = since(start)
	line.Answer = new(who.Answer)
	return price.Unpack(m, line.Answer)
}
