package serve

import (
	"context"
	"io"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"forkd.dev/forkd/tests/shop/internal/price"
	"forkd.dev/forkd/tests/shop/internal/who"
)

type priceServer struct{ *Service }

func startPrice(s *Service, listen []string) error {
	l, err := s.listen(listen[0])
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	price.Register(server, priceServer{s})
	healthy := health.NewServer()
	healthy.SetServingStatus(price.Name, grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(server, healthy)
	s.onStop(func(ctx context.Context) {
		defer context.AfterFunc(ctx, server.Stop)()
		server.GracefulStop()
	})
	go func() { s.fail(server.Serve(l)) }()
	return nil
}

// reply is an answer with the number and the request that it belongs to.
type reply struct {
	who.Answer
	N    int            `json:"n"`
	Echo map[string]any `json:"echo,omitempty"`
}

func (s priceServer) answer(ctx context.Context, method string) who.Answer {
	md, _ := metadata.FromIncomingContext(ctx)
	key := who.Read(md.Get).Key()
	s.log.Info("request", "service", s.self.Service, "method", method, "proto", "gRPC", "key", key)
	return s.self.Answer("gRPC", key)
}

func (s priceServer) signature() metadata.MD {
	return metadata.Pairs("shop-service", s.self.Service, "shop-where", s.self.Where, "shop-pod", s.self.Pod)
}

// Get says who answered.
func (s priceServer) Get(ctx context.Context, _ *price.Message) (*price.Message, error) {
	grpc.SetHeader(ctx, s.signature())
	return price.Pack(s.answer(ctx, "Get"))
}

// Watch says it n times, ms apart.
func (s priceServer) Watch(in *price.Message, stream grpc.ServerStreamingServer[price.Message]) error {
	ask := struct {
		N  int   `json:"n"`
		Ms int64 `json:"ms"`
	}{N: 5, Ms: 100}
	if err := price.Unpack(in, &ask); err != nil {
		return err
	}
	stream.SetHeader(s.signature())
	answer := s.answer(stream.Context(), "Watch")
	for i := range min(ask.N, maxParts) {
		if i > 0 && !sleep(stream.Context(), ask.Ms) {
			return stream.Context().Err()
		}
		if err := send(stream, reply{Answer: answer, N: i}); err != nil {
			return err
		}
	}
	return nil
}

// Chat echoes every message as it comes. The trailers say how many there were, and for how long.
func (s priceServer) Chat(stream grpc.BidiStreamingServer[price.Message, price.Message]) error {
	start := time.Now()
	stream.SendHeader(s.signature())
	answer := s.answer(stream.Context(), "Chat")
	for n := 0; ; n++ {
		in, err := stream.Recv()
		if err == io.EOF {
			stream.SetTrailer(metadata.Pairs("shop-count", strconv.Itoa(n), "shop-where", s.self.Where,
				"shop-ms", strconv.FormatInt(time.Since(start).Milliseconds(), 10)))
			return nil
		}
		if err != nil {
			return err
		}
		if err := send(stream, reply{Answer: answer, N: n, Echo: in.AsMap()}); err != nil {
			return err
		}
	}
}

func send(stream interface{ Send(*price.Message) error }, r reply) error {
	m, err := price.Pack(r)
	if err != nil {
		return err
	}
	return stream.Send(m)
}
