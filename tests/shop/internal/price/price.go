// Package price is the gRPC service of the shop.
//
//	package shop;
//	service Price {
//	  rpc Get(google.protobuf.Struct) returns (google.protobuf.Struct);
//	  rpc Watch(google.protobuf.Struct) returns (stream google.protobuf.Struct);
//	  rpc Chat(stream google.protobuf.Struct) returns (stream google.protobuf.Struct);
//	}
//
// Its messages are a well-known type, so that no code has to be generated.
package price

import (
	"context"
	"encoding/json"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/structpb"
)

// Message is what every method takes and returns.
type Message = structpb.Struct

// Server answers the calls.
type Server interface {
	Get(context.Context, *Message) (*Message, error)
	Watch(*Message, grpc.ServerStreamingServer[Message]) error
	Chat(grpc.BidiStreamingServer[Message, Message]) error
}

// Name is the full name of the service.
const Name = "shop.Price"

var (
	watch = grpc.StreamDesc{StreamName: "Watch", ServerStreams: true, Handler: func(s any, stream grpc.ServerStream) error {
		in := new(Message)
		if err := stream.RecvMsg(in); err != nil {
			return err
		}
		return s.(Server).Watch(in, &grpc.GenericServerStream[Message, Message]{ServerStream: stream})
	}}
	chat = grpc.StreamDesc{StreamName: "Chat", ServerStreams: true, ClientStreams: true, Handler: func(s any, stream grpc.ServerStream) error {
		return s.(Server).Chat(&grpc.GenericServerStream[Message, Message]{ServerStream: stream})
	}}
)

// Register adds the service to a gRPC server.
func Register(r grpc.ServiceRegistrar, server Server) {
	r.RegisterService(&grpc.ServiceDesc{
		ServiceName: Name,
		HandlerType: (*Server)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "Get", Handler: get}},
		Streams:     []grpc.StreamDesc{watch, chat},
	}, server)
}

func get(s any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
	in := new(Message)
	if err := decode(in); err != nil {
		return nil, err
	}
	if intercept == nil {
		return s.(Server).Get(ctx, in)
	}
	info := &grpc.UnaryServerInfo{Server: s, FullMethod: "/" + Name + "/Get"}
	return intercept(ctx, in, info, func(ctx context.Context, in any) (any, error) {
		return s.(Server).Get(ctx, in.(*Message))
	})
}

// Client calls the service.
type Client struct{ grpc.ClientConnInterface }

// Get asks once.
func (c Client) Get(ctx context.Context, in *Message, opts ...grpc.CallOption) (*Message, error) {
	out := new(Message)
	return out, c.Invoke(ctx, "/"+Name+"/Get", in, out, opts...)
}

// Watch asks for a stream of answers.
func (c Client) Watch(ctx context.Context, in *Message, opts ...grpc.CallOption) (grpc.ServerStreamingClient[Message], error) {
	stream, err := c.NewStream(ctx, &watch, "/"+Name+"/Watch", opts...)
	if err != nil {
		return nil, err
	}
	if err := stream.SendMsg(in); err != nil {
		return nil, err
	}
	return &grpc.GenericClientStream[Message, Message]{ClientStream: stream}, stream.CloseSend()
}

// Chat opens a stream in both directions.
func (c Client) Chat(ctx context.Context, opts ...grpc.CallOption) (grpc.BidiStreamingClient[Message, Message], error) {
	stream, err := c.NewStream(ctx, &chat, "/"+Name+"/Chat", opts...)
	if err != nil {
		return nil, err
	}
	return &grpc.GenericClientStream[Message, Message]{ClientStream: stream}, nil
}

// Pack turns a value that has a JSON object form into a message.
func Pack(value any) (*Message, error) {
	text, err := json.Marshal(value)
	if err != nil {
		return nil, err
	}
	m := new(Message)
	return m, m.UnmarshalJSON(text)
}

// Unpack is the reverse of Pack.
func Unpack(m *Message, value any) error {
	text, err := m.MarshalJSON()
	if err != nil {
		return err
	}
	return json.Unmarshal(text, value)
}
